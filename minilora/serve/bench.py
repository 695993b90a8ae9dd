"""How fast a base serves many adapters: Poisson arrivals, Zipf popularity, throughput and waiting times.

    P(adapter k) = k^-zipf / sum over K        time between arrivals ~ Exp(rate)

S-LoRA's workload (Sheng et al. 2023, section 7) on adapters of random numbers, since time does not depend on
values. Throughput is measured on requests that are all there at the start, waiting times on requests that
arrive at a share `load` of the rate at which the base alone can serve them. A round measures both for each
number of adapters, in turns forwards and backwards, with the same prompts, lengths and arrivals for all;
ratios are taken within a round. Adapters are in memory from the start, the popular ones first, as far as they
fit; a first burst is not measured.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import ConfigError, check_float, check_int, short
from ..formats import huggingface
from ..lora import inject
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..peft.loading import save_adapter
from ..table import Table, report
from ..tree import replica, trained
from .bank import Bank, Counters
from .engine import Engine, Request, Stream

PROMPT, NEW = (8, 32), (16, 48)  # the fewest and the most tokens of a prompt, and of what is written
POINTS = (50, 95)  # percentiles of waiting times


@dataclass(frozen=True)
class Row:
    """How one number of adapters is served; 0 is the base alone. Times are milliseconds, of all rounds."""

    adapters: int
    tokens_per_second: float
    to_base: float  # this throughput over that of the base in the same round
    first_token: tuple[float, ...]  # from arrival to the first token, at POINTS
    latency: tuple[float, ...]  # from arrival to the last token
    in_memory: float  # the share of requests for which no adapter was read
    evictions: int

    def cells(self) -> tuple[str, ...]:
        times = (f"{ms:,.0f}" for ms in (*self.first_token, *self.latency))
        numbers = f"{self.tokens_per_second:,.0f}", f"{self.to_base:.2f}", *times
        return (f"{self.adapters:,}" if self.adapters else "none", *numbers, f"{self.in_memory:.0%}")


@report
@dataclass(frozen=True)
class Served:
    """The result of `serve_bench`; prints as a table."""

    rank: int
    targets: str
    bytes: int  # of one adapter in memory
    budget: int
    slots: int
    requests: int
    load: float
    zipf: float
    rows: tuple[Row, ...]

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> list[str | Table]:
        head = ["adapters", "tokens/s", "to base", *(f"first p{p}" for p in POINTS)]
        head += [*(f"last p{p}" for p in POINTS), "in memory"]
        what = f"rank {self.rank} on {self.targets}, {self.bytes:,} bytes each; {self.budget:,} in memory"
        how = f"{self.requests} requests, {self.slots} at a time, Zipf {self.zipf:g}; ms from arrival to the "
        how += f"first and last token at {self.load:.0%} of the rate that the base can serve"
        return [Table(head, [row.cells() for row in self.rows]), what, how]


@dataclass(eq=False)
class Trial:
    """An engine for one number of adapters, and what was measured of it after `warm`, round by round."""

    adapters: int
    engine: Engine
    before: Counters = field(default_factory=Counters)  # the bank's, when measuring began
    throughput: list[float] = field(default_factory=list)  # tokens per second
    first: list[float] = field(default_factory=list)  # milliseconds, of all requests
    last: list[float] = field(default_factory=list)
    requests: int = 0

    def counters(self) -> Counters:
        """The bank's at this moment."""
        return replace(self.engine.bank.counters) if self.engine.bank else Counters()

    def warm(self, requests: Sequence[Request]) -> None:
        """Serve requests before anything is measured."""
        play(self.engine, [0.0] * len(requests), requests)
        self.before = self.counters()

    def burst(self, requests: Sequence[Request]) -> None:
        """Serve requests that are all there at the start."""
        start = self.engine.clock()
        streams = play(self.engine, [0.0] * len(requests), requests)
        seconds = self.engine.clock() - start
        self.throughput.append(sum(len(stream.tokens) for stream in streams) / seconds)
        self.requests += len(requests)

    def trickle(
        self,
        arrivals: Sequence[float],
        requests: Sequence[Request],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Serve requests that come one after the other."""
        start = self.engine.clock()
        for at, stream in zip(arrivals, play(self.engine, arrivals, requests, sleep), strict=True):
            self.first.append(1000 * (stream.times[1] - start - at))
            self.last.append(1000 * (stream.times[-1] - start - at))
        self.requests += len(requests)

    def row(self, base: Trial) -> Row:
        """The medians and percentiles over all rounds."""
        pairs = zip(self.throughput, base.throughput, strict=True)
        first, last = (tuple(np.percentile(ms, POINTS).tolist()) for ms in (self.first, self.last))
        after = self.counters()
        share = 1 - (after.loads - self.before.loads) / self.requests
        evictions = after.evictions - self.before.evictions
        to_base = median(own / other for own, other in pairs)
        return Row(self.adapters, median(self.throughput), to_base, first, last, share, evictions)


def serve_bench(
    base: Path | str = "base",
    adapters: Sequence[int] = (1, 5, 100, 1000),
    *,
    rank: int = 8,
    targets: str | Sequence[str] = "all-linear",
    budget: int = 1 << 30,
    slots: int = 32,
    requests: int = 200,
    load: float = 0.7,
    zipf: float = 1.0,
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, known: None,
) -> Served:
    """Measure a base with these numbers of adapters, beside the base alone.

    The adapters lie in a temporary folder meanwhile. ConfigError for a number that has no meaning, a budget
    below one adapter, or a base that takes no text of the workload: before any is written.
    """
    for name, value in {"requests": requests, "rounds": rounds, "slots": slots, "budget": budget}.items():
        check_int(name, value, 1)
    check_float("load", load, 0, math.inf, open_low=True)
    check_float("zipf", zipf, 0, math.inf)
    if not adapters or any(type(n) is not int or n < 1 for n in adapters):
        raise ConfigError(f"adapters is {short(adapters)}; expected numbers of adapters, at least 1")
    config = LoraConfig(r=rank, targets=targets, init="both")
    model, rng = huggingface.load(base), np.random.default_rng(seed)
    V, positions = model.config.vocab_size, PROMPT[1] + NEW[1]
    if (most := model.config.max_position_embeddings) < positions:
        raise ConfigError(f"{base}: takes {most} tokens; expected at least {positions}, the longest text")
    copy = adapted(model, config, rng)
    if budget < (size := bytes_of(copy)):
        raise ConfigError(f"budget is {budget:,} bytes; expected at least {size:,}, those of one adapter")
    with tempfile.TemporaryDirectory() as temp:
        write_adapters(copy, Path(temp), max(adapters))
        trials = []
        for n in (0, *adapters):
            bank = resident(model, Path(temp), n, budget, size) if n else None
            trials.append(Trial(n, Engine(model, bank, slots=slots, positions=positions, queue=requests)))
            trials[-1].warm(workload(rng, min(slots, requests), n, zipf, V))
        known = 2 * rounds * len(trials)
        for done in range(0, known, 2 * len(trials)):
            turn = trials if done % (4 * len(trials)) == 0 else trials[::-1]
            same = texts(rng, requests, V)
            for i, trial in enumerate(turn, 1):
                trial.burst(popular(rng, same, trial.adapters, zipf))
                progress(done + i, known)
            rate = load * trials[0].throughput[-1] / (sum(NEW) / 2)  # requests per second
            arrivals = np.cumsum(rng.exponential(1 / rate, requests)).tolist()
            same = texts(rng, requests, V)
            for i, trial in enumerate(turn, len(trials) + 1):
                trial.trickle(arrivals, popular(rng, same, trial.adapters, zipf))
                progress(done + i, known)
        rows = tuple(trial.row(trials[0]) for trial in trials)
    what = targets if isinstance(targets, str) else ",".join(targets)
    return Served(rank, what, size, budget, slots, requests, load, zipf, rows)


def names(count: int) -> list[str]:
    """The names of so many adapters, the most popular first."""
    return [f"a{k:05}" for k in range(count)]


def adapted(model: Llama, config: LoraConfig, rng: np.random.Generator) -> Llama:
    """A replica with an adapter of random numbers."""
    copy = replica(model)
    inject(copy, config, rng=rng)
    return copy


def bytes_of(model: Llama) -> int:
    """The bytes of a model's adapter in memory."""
    return sum(p.data.nbytes for p in trained(model).values())


def write_adapters(model: Llama, folder: Path, count: int) -> None:
    """Fill a folder with so many copies of a model's adapter, by name."""
    first, *others = names(count)
    save_adapter(model, folder / first)
    for name in others:
        shutil.copytree(folder / first, folder / name)


def resident(model: Llama, folder: Path, count: int, budget: int, size: int) -> Bank:
    """A bank with the most popular of `count` adapters in memory, as many as fit."""
    bank = Bank(model, folder, budget)
    for name in reversed(names(min(count, budget // size))):  # the most popular is the last to be evicted
        bank.fetch(name)
    return bank


def workload(rng: np.random.Generator, count: int, adapters: int, zipf: float, V: int) -> Sequence[Request]:
    """Requests with random prompts and lengths, for adapters of these popularities."""
    return popular(rng, texts(rng, count, V), adapters, zipf)


def texts(rng: np.random.Generator, count: int, V: int) -> list[Request]:
    """Requests for the base, with random prompts and lengths."""
    return [
        Request(
            rng.integers(0, V, int(rng.integers(PROMPT[0], PROMPT[1] + 1))),
            int(rng.integers(NEW[0], NEW[1] + 1)),
            temperature=0,
        )
        for _ in range(count)
    ]


def popular(
    rng: np.random.Generator, requests: Sequence[Request], adapters: int, zipf: float
) -> Sequence[Request]:
    """The requests for adapters of these popularities; 0 adapters: for the base."""
    if not adapters:
        return requests
    chosen = drawn(rng, len(requests), adapters, zipf)
    return [replace(request, adapter=name) for request, name in zip(requests, chosen, strict=True)]


def drawn(rng: np.random.Generator, count: int, adapters: int, zipf: float) -> list[str]:
    """The adapters that so many requests are for, by Zipf's law."""
    known, weights = names(adapters), np.arange(1, adapters + 1) ** -float(zipf)
    return [known[k] for k in rng.choice(adapters, count, p=weights / weights.sum())]


def play(
    engine: Engine,
    arrivals: Sequence[float],
    requests: Sequence[Request],
    sleep: Callable[[float], None] = time.sleep,
) -> list[Stream]:
    """Submit each request at its second, step until all are finished, and return their streams.

    Raises the error of a stream that has one.
    """
    start, streams = engine.clock(), []
    for at, request in zip(arrivals, requests, strict=True):
        while (wait := start + at - engine.clock()) > 0:
            if engine.busy():
                engine.step()
            else:
                sleep(wait)
        streams.append(engine.submit(request))
    engine.run()
    for stream in streams:
        if stream.error:
            raise stream.error
    return streams

"""Continuous batching: every step gives each running text one more token, and texts join and leave between.

    step:  cancelled texts leave  ->  waiting ones take free slots  ->  one forward  ->  one token for each

The M tokens of a step, next tokens and prompts alike, are the rows of one mixed batch (fast/mixed.py) over
one cache (slots.py): iteration-level scheduling (Orca, Yu et al. 2022). At most `chunk` of them are of
prompts, so that a long prompt holds up nobody for long (Sarathi-Serve, Agrawal et al. 2024).

Adapters take free slots in turn, one request each. An adapter that must be read when a step has read another
already, or for which memory has no room, keeps its turn and a free slot while others pass: those in memory,
or, where there is no room, only requests for the base. So a lone request for an adapter, behind requests for
W other adapters, waits for at most W + 1 times the steps that the longest text spends in its slot. That holds
however many requests the others have, and whether or not they are damaged or memory has room for them.

An error while a text's adapter is read or its token is drawn ends that text; one in the forward, the texts
that took part; any other ends all, and the engine refuses from then on. So no stream waits for ever.

One thread computes: the caller's, by `step` or `run`, or the engine's own, after `start`. Stands in for the
schedulers of vLLM and S-LoRA; leaves out preemption, shared prefixes and beams.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from ..backend import keep_memory, quiet_overflow, to_device, to_host
from ..decoding import check_sampling, sample
from ..errors import BusyError, InputError, NonFiniteError, StateError, check_int, nearest, short
from ..fast.mixed import mixed
from ..lora import LowRank
from ..model import Llama
from .bank import Bank
from .slots import Span, slots_of

REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class Request:
    """A prompt to continue, as for `generate`: ids (T,), and the name of an adapter or None for the base.

    The text ends before the first of the tokens `stops`. `seed` seeds a generator for this text alone.
    """

    prompt: Sequence[int] | np.ndarray
    max_new_tokens: int
    adapter: str | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stops: frozenset[int] = frozenset()


class Stream:
    """The tokens of a request so far. Iterating waits for the next one, until the text ends.

    `finish_reason` is None while it is not finished, then "stop", "length", "cancelled" or "error"; iterating
    raises the `error`, and StateError if no thread computes. Times are seconds of the engine's clock.
    """

    def __init__(
        self, request: Request, prompt: np.ndarray, engine: Engine, told: Callable[[], None] | None = None
    ) -> None:
        self.request, self.prompt, self.engine = request, prompt, engine  # prompt (T,), checked
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.times: list[float] = [engine.clock()]  # of its arrival, and of each token
        self.told = told  # called by the engine's thread after every change
        self.changed = threading.Condition()

    def __iter__(self) -> Iterator[int]:
        n = 0
        while True:
            with self.changed:
                while n == len(self.tokens) and self.finish_reason is None:
                    if self.engine.thread is None:
                        raise StateError("the engine has not been started; call start() or run() first")
                    self.changed.wait()
            if n == len(self.tokens):
                break
            yield self.tokens[n]
            n += 1
        if self.error:
            raise self.error

    def tell(self, token: int | None = None, reason: str | None = None) -> None:
        """Note a token, the end, or both; wake all that wait."""
        with self.changed:
            if token is not None:
                self.tokens.append(token)
                self.times.append(self.engine.clock())
            self.finish_reason = reason
            self.changed.notify_all()
        if self.told:
            try:
                self.told()
            except Exception:  # a listener that fails ends no text, and is not called again
                self.told = None


@dataclass(eq=False)
class Running:
    """A text in a slot."""

    stream: Stream
    layers: Mapping[str, LowRank] | None  # of its adapter; None: the base
    rng: np.random.Generator
    pending: np.ndarray  # ids that are not in the cache yet
    seen: int = 0  # positions in the cache


@dataclass
class Counters:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0  # read
    new_tokens: int = 0  # written
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    refused: int = 0  # because the queue was full


class Engine:
    """Serves requests for a base and the adapters of a bank, at most `slots` at a time.

    `positions` bounds prompt and new tokens of a text, `queue` the requests that wait, `chunk` the tokens of
    prompts in a step. With `invariant`, a text is the same to the bit in any company; that takes longer.
    `clock` gives the seconds in a stream's times. The model is only read. Memory beyond the model and the
    bank's budget: the slots, the stacks of a step's next tokens (`MixedBatch`), and the adapters of the last
    step, which stay even if the bank evicts them. StateError if the model is merged, ConfigError for a number
    that has no meaning.

        with Engine(model, Bank(model, "adapters/")) as engine:    # a thread of its own
            for token in engine.submit(Request(ids, 20, "pirate")): ...
    """

    def __init__(
        self,
        model: Llama,
        bank: Bank | None = None,
        *,
        slots: int = 32,
        positions: int = 1024,
        queue: int = 256,
        chunk: int = 256,
        invariant: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.bank, self.invariant, self.clock = model, bank, invariant, clock
        for name, value in {"slots": slots, "positions": positions, "queue": queue, "chunk": chunk}.items():
            check_int(name, value, 1)
        self.positions = min(positions, model.config.max_position_embeddings)
        self.queue, self.chunk = queue, chunk
        self.replica, self.batch = mixed(model, invariant=invariant)
        self.cache = slots_of(model, slots, self.positions)
        self.free = list(range(slots))  # a heap: the lowest is taken first
        self.running: dict[int, Running] = {}  # by slot
        self.waiting: OrderedDict[str | None, deque[Stream]] = OrderedDict()  # by adapter, in turn
        self.cancelled: set[Stream] = set()
        self.counters = Counters()
        self.changed = threading.Condition()  # guards waiting, cancelled and stopping
        self.stopping = False  # no more requests are taken
        self.dropping = False  # and those at hand are cancelled
        self.failure: BaseException | None = None  # the error that ended all streams
        self.thread: threading.Thread | None = None
        keep_memory()

    # ---- from any thread

    def submit(self, request: Request, told: Callable[[], None] | None = None) -> Stream:
        """Put a request into the queue; `told()` is called by the engine's thread after every change.

        InputError for a request that the model cannot take or an adapter that does not exist, BusyError if
        the queue is full, StateError if the engine is stopping or has failed.
        """
        stream = Stream(request, self.check(request), self, told)
        with self.changed:
            if self.failure:
                raise failed(self.failure)
            if self.stopping:
                raise StateError("the engine is stopping and takes no more requests")
            if (n := self.queued()) >= self.queue:
                self.counters.refused += 1
                raise BusyError(
                    f"{n} requests are waiting; expected fewer than {self.queue}; try again later"
                )
            self.waiting.setdefault(request.adapter, deque()).append(stream)
            self.changed.notify()
        return stream

    def check(self, request: Request) -> np.ndarray:
        """The ids (T,) of a request; InputError if it cannot be served, before any arithmetic."""
        new = request.max_new_tokens
        check_sampling(new, request.temperature, request.top_k, request.top_p)
        if type(request.seed) is not int or request.seed < 0:
            raise InputError(f"seed is {short(request.seed)}; expected an int, at least 0")
        if type(request.stops) is not frozenset or any(type(token) is not int for token in request.stops):
            raise InputError(f"stops is {short(request.stops)}; expected a frozenset of ints")
        (ids,) = to_host(self.model.check([request.prompt]))
        if len(ids) + new > self.positions:
            raise InputError(f"{len(ids)} tokens and {new} new ones; a slot has {self.positions} positions")
        if request.adapter is not None:
            if self.bank is None:
                raise InputError(f"there is no adapter {short(request.adapter)}; {nearest('', ())}")
            self.bank.check(request.adapter)
        return ids

    def cancel(self, stream: Stream) -> None:
        """End a stream at the next step, whether it waits or runs; one that has ended stays as it is.

        InputError for anything but a stream of this engine.
        """
        if not isinstance(stream, Stream) or stream.engine is not self:
            raise InputError(f"{short(stream)} is no stream of this engine; expected one that submit() gave")
        with self.changed:
            if stream.finish_reason is None:
                self.cancelled.add(stream)

    def queued(self) -> int:
        """How many requests wait."""
        with self.changed:
            return sum(map(len, self.waiting.values()))

    def start(self) -> None:
        """Compute in a thread, until `stop`; StateError if it runs already or has stopped."""
        if self.thread or self.stopping:
            raise StateError("the engine has been started; make a new one")
        thread = threading.Thread(target=self.loop, name="minilora-engine", daemon=True)
        thread.start()
        self.thread = thread

    def stop(self, finish: bool = True) -> None:
        """Take no more requests, and return when those at hand are finished or, without `finish`, cancelled.

        Once they are to be cancelled, a later call with `finish` does not save them.
        """
        with self.changed:
            self.stopping = True
            self.dropping |= not finish
            self.changed.notify()
        if self.thread:
            self.thread.join()
        else:
            self.run()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(finish=kind is None)

    # ---- in the one thread that computes

    def loop(self) -> None:
        """Step while there is something to do; wait while there is not; end when stopping and idle."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.busy() or self.stopping)
                if not self.busy():
                    return
            self.step()

    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.running or self.waiting or self.cancelled)

    def run(self) -> None:
        """Step until every request is finished."""
        while self.busy():
            self.step()

    def step(self) -> None:
        """One step: cancelled texts leave, waiting ones join, and each running one gets its next token.

        An exception that leaves it is the engine's own error, and ends all streams.
        """
        try:
            self.leave()
            self.join()
            if self.running:
                self.forward()
        except BaseException as e:
            self.fail(e)
            raise

    def fail(self, cause: BaseException) -> None:
        """End every stream, and refuse from now on."""
        with self.changed:
            self.stopping, self.failure = True, cause
            streams = [stream for line in self.waiting.values() for stream in line]
            streams += [row.stream for row in self.running.values()]
            for mine in (self.waiting, self.running, self.cancelled):
                mine.clear()
        for stream in streams:
            if stream.finish_reason is None:
                with contextlib.suppress(BaseException):  # of a listener; the others must be told, too
                    self.close(stream, "error", failed(cause))

    def leave(self) -> None:
        """Drop the cancelled requests; all, if the engine is to stop at once."""
        with self.changed:
            cancelled, self.cancelled = self.cancelled, set()
            if self.dropping:
                cancelled.update(*self.waiting.values())
                cancelled.update(row.stream for row in self.running.values())
        slots = {row.stream: slot for slot, row in self.running.items()}
        for stream in cancelled:
            if stream in slots:
                self.end(slots[stream], "cancelled")
            elif stream.finish_reason is None:
                self.refuse(stream, "cancelled")

    def join(self) -> None:
        """Give free slots to waiting requests, adapters in turn.

        A step reads at most one adapter from disk, so running texts wait no longer than that. An adapter that
        cannot be read fails its request. If none was read, one is read ahead.
        """
        read = full = False
        passed = 0  # adapters that were passed: they keep their turns and as many free slots
        while len(self.free) > passed and (line := self.in_turn(passed, passed + 1)):
            (stream,) = line
            name, loaded = stream.request.adapter, None
            if self.bank and name is not None:
                missing = name not in self.bank.loaded
                if full or (missing and read):
                    passed += 1
                    continue
                read |= missing
                try:
                    loaded = self.bank.take(name)
                except Exception as e:  # a folder that is gone, damaged, another base's: this request's alone
                    self.refuse(stream, "error", e)
                    self.pass_turn(name)
                    continue
                if loaded is None:  # no room until a text ends; nobody else takes memory before that
                    full = True
                    passed += 1
                    continue
            rng = np.random.default_rng(stream.request.seed)
            row = Running(stream, loaded.layers if loaded else None, rng, stream.prompt)
            self.running[heapq.heappop(self.free)] = row
            self.unqueue(stream)
            self.pass_turn(name)
        if not read:
            self.read_ahead()

    def read_ahead(self) -> None:
        """Read the adapter of one request that waits, if that evicts none that another one waits for."""
        line = self.in_turn(0, len(self.running) + len(self.free))
        names = [name for stream in line if (name := stream.request.adapter) is not None]
        for stream in line:
            name = stream.request.adapter
            if self.bank and name is not None and name not in self.bank.loaded:
                try:
                    self.bank.fetch(name, keep=names)
                except Exception as e:
                    self.refuse(stream, "error", e)
                    self.pass_turn(name)
                return

    def in_turn(self, start: int, stop: int) -> list[Stream]:
        """The next requests of the adapters that are next: from the `start`-th of them to the `stop`-th."""
        with self.changed:
            return [line[0] for line in islice(self.waiting.values(), start, stop)]

    def unqueue(self, stream: Stream) -> None:
        """Take a request out of its adapter's line."""
        with self.changed:
            line = self.waiting[stream.request.adapter]
            line.remove(stream)
            if not line:
                del self.waiting[stream.request.adapter]

    def pass_turn(self, name: str | None) -> None:
        """An adapter has had its turn: its other requests go behind all others."""
        with self.changed:
            if name in self.waiting:
                self.waiting.move_to_end(name)

    def forward(self) -> None:
        """One forward over the running texts; then each whose prompt is read gets its next token.

        An error in the forward ends the texts that took part.
        """
        single = [(slot, row, 1) for slot, row in sorted(self.running.items()) if len(row.pending) == 1]
        parts, left = single, self.chunk
        for slot, row in self.running.items():  # in the order in which they joined
            if len(row.pending) > 1 and (count := min(len(row.pending), left)):
                parts.append((slot, row, count))
                left -= count
        try:
            logits = self.logits([(Span(slot, row.seen, count), row) for slot, row, count in parts])
        except Exception as e:
            for slot, _, _ in parts:
                self.end(slot, "error", e)
            return
        self.counters.steps += 1
        for (slot, row, count), z in zip(parts, logits, strict=True):
            if row.seen < len(row.stream.prompt):
                self.counters.prompt_tokens += count
            row.seen, row.pending = row.seen + count, row.pending[count:]
            try:
                token = draw(row, z)
            except Exception as e:  # of this text's numbers alone
                self.end(slot, "error", e)
                continue
            if token is not None:
                self.extend(slot, row, token)

    def logits(self, parts: Sequence[tuple[Span, Running]]) -> np.ndarray:
        """The logits (n, V) after the last token of each span, float64, on the host."""
        ids = np.concatenate([row.pending[: span.length] for span, row in parts])
        layers = [row.layers for _, row in parts]
        lengths = [span.length for span, _ in parts]
        last = to_device(np.cumsum(lengths) - 1)
        whole = any(some and "lm_head" in some for some in layers)  # then the head, too, must see all rows
        past = self.cache.step([span for span, _ in parts], self.invariant, None if whole else last)
        with quiet_overflow(), self.batch.rows(layers, lengths):
            logits, _ = self.replica.forward(to_device(ids[:, None]), past=past)
        return to_host((logits[last] if whole else logits)[:, 0]).astype(np.float64)

    def extend(self, slot: int, row: Running, token: int) -> None:
        """Give a text its next token, or end it."""
        request = row.stream.request
        if token in request.stops:
            self.end(slot, "stop")
            return
        self.counters.new_tokens += 1
        row.pending = np.array([token])
        if len(row.stream.tokens) + 1 < request.max_new_tokens:
            row.stream.tell(token)
        else:
            self.end(slot, "length", token=token)

    def end(self, slot: int, reason: str, error: Exception | None = None, token: int | None = None) -> None:
        """Free a slot: its text's keys and values are zeroed, its adapter is given back, its stream ends."""
        row = self.running[slot]
        self.cache.clear(slot)
        if self.bank and row.stream.request.adapter is not None:
            self.bank.give(row.stream.request.adapter)
        del self.running[slot]
        heapq.heappush(self.free, slot)
        self.close(row.stream, reason, error, token)

    def refuse(self, stream: Stream, reason: str, error: Exception | None = None) -> None:
        """End a request that waits."""
        self.unqueue(stream)
        self.close(stream, reason, error)

    def close(self, stream: Stream, reason: str, error: Exception | None, token: int | None = None) -> None:
        """Note the end of a stream."""
        stream.error = error
        self.counters.finished[reason] += 1
        stream.tell(token, reason)


def draw(row: Running, logits: np.ndarray) -> int | None:
    """A text's next token from its logits (V,), or None before its prompt is read; NonFiniteError."""
    request = row.stream.request
    if not np.isfinite(logits).all():
        raise NonFiniteError(f"the logits are not finite, with adapter {short(request.adapter)}")
    if len(row.pending):
        return None
    how = request.temperature, request.top_k, request.top_p
    return int(sample(logits[None], row.rng, *how)[0])


def failed(cause: BaseException) -> StateError:
    """The error of an engine that has failed."""
    error = StateError("the engine has failed and takes no more requests; make a new one")
    error.__cause__ = cause
    return error

"""What a server has done and holds, in the text form that Prometheus reads (version 0.0.4).

    name{label="value"} number        a counter's name ends in _total; a histogram's buckets are cumulative

Stands in for prometheus_client's collectors; leaves out every metric but these, and the process's own. Its
tests read the text with that package's parser.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from .engine import REASONS, Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)

Sample = tuple[str, str, float]  # what is added to the name, labels, number


class Histogram:
    """How many values were at most each of SECONDS, and their sum."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.counts = [0] * (len(SECONDS) + 1)  # in (SECONDS[i - 1], SECONDS[i]]; the last has no bound

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(SECONDS, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[Sample]:
        """The cumulative buckets, the sum and the count."""
        below = 0
        for bound, count in zip([*map(str, SECONDS), "+Inf"], self.counts, strict=True):
            below += count
            yield "_bucket", f'{{le="{bound}"}}', below
        yield "_sum", "", self.sum
        yield "_count", "", below


class Metrics:
    """The numbers of an engine, and of the answers to its clients."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.finished = Counter(dict.fromkeys(REASONS, 0))  # answers by reason, as their clients saw it
        self.refused: Counter[int] = Counter()  # errors before any text, by HTTP status
        self.first, self.whole = Histogram(), Histogram()  # seconds from arrival

    def text(self) -> str:
        """All of them, one a line."""
        return "".join(self.lines())

    def lines(self) -> Iterator[str]:
        """The lines of `text`."""
        engine, bank = self.engine, self.engine.bank
        done = engine.counters
        tokens = {"prompt": done.prompt_tokens, "generated": done.new_tokens}
        yield from family("requests_total", "Answers by finish reason.", labelled("reason", self.finished))
        yield from family("refused_total", "Requests answered by an error, by HTTP status.",
                          labelled("status", self.refused))  # fmt: skip
        yield from family("tokens_total", "Tokens read and generated.", labelled("kind", tokens))
        yield from family("steps_total", "Steps of the engine.", one(done.steps))
        yield from family("requests_waiting", "Requests in the queue.", one(engine.queued()))
        yield from family("requests_running", "Slots in use.", one(len(engine.running)))
        yield from family("slots", "Slots.", one(len(engine.cache.filled)))
        if bank:
            counts = {name: getattr(bank.counters, name) for name in ("hits", "misses", "loads", "evictions")}
            for name, count in counts.items():
                yield from family(f"adapter_{name}_total", f"Adapters in memory: {name}.", one(count))
            yield from family("adapter_bytes", "Bytes of the adapters in memory.", one(bank.counters.bytes))
            yield from family("adapter_budget_bytes", "Bytes that they may have.", one(bank.budget))
        yield from family("first_token_seconds", "From arrival to the first token.", self.first.samples())
        yield from family("request_seconds", "From arrival to the end of the answer.", self.whole.samples())


def one(number: float) -> list[Sample]:
    """A number without labels."""
    return [("", "", number)]


def labelled(label: str, counts: Mapping[str, int] | Mapping[int, int]) -> Iterator[Sample]:
    """A sample for each value of a label."""
    return (("", f'{{{label}="{value}"}}', count) for value, count in counts.items())


def family(name: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    """The lines of one metric, whose name says its kind."""
    kind = "counter" if name.endswith("_total") else "histogram" if name.endswith("_seconds") else "gauge"
    yield f"# HELP minilora_{name} {text}\n# TYPE minilora_{name} {kind}\n"
    for more, labels, number in samples:
        yield f"minilora_{name}{more}{labels} {number}\n"

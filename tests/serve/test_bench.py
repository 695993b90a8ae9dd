"""The benchmark's workload is what it says, and its report has a line for each number of adapters."""

import time
from collections import Counter

import numpy as np
import pytest
from served import base, bytes_of, write

from minilora.errors import ConfigError, FormatError
from minilora.formats.huggingface import save_model
from minilora.lora import bases
from minilora.methods.lora_config import LoraConfig
from minilora.peft.folder import WEIGHTS
from minilora.serve import bench
from minilora.serve.bank import Bank
from minilora.serve.bench import NEW, PROMPT, names, play, resident, serve_bench, workload, write_adapters
from minilora.serve.engine import Engine, Request


def test_the_popularity_of_adapters_is_zipfs_law():
    """Each count is binomial, so it is off by 5 standard deviations with a probability below 1e-6."""
    rng, n, K = np.random.default_rng(0), 5_000, 5
    counts = Counter(request.adapter for request in workload(rng, n, K, 1.5, 7))
    weights = np.arange(1, K + 1) ** -1.5
    for name, p in zip(names(K), weights / weights.sum(), strict=True):
        assert abs(counts[name] - n * p) <= 5 * np.sqrt(n * p * (1 - p))


def test_requests_have_the_lengths_of_the_workload_and_none_an_adapter_if_there_are_none():
    requests = workload(np.random.default_rng(0), 2000, 0, 1.0, 7)
    assert {request.adapter for request in requests} == {None}
    for lengths, (low, high) in (
        ([len(request.prompt) for request in requests], PROMPT),
        ([request.max_new_tokens for request in requests], NEW),
    ):
        assert set(lengths) == set(range(low, high + 1))
    assert set(np.concatenate([request.prompt for request in requests]).tolist()) == set(range(7))


def test_the_adapters_in_memory_are_those_that_reading_gives_the_popular_ones_last_out(tmp_path):
    model, config = base(np.float32), LoraConfig(r=2, init="both")
    copy = bench.adapted(model, config, np.random.default_rng(0))
    write_adapters(copy, tmp_path, 5)
    size = bench.bytes_of(copy)
    bank = resident(model, tmp_path, 5, 3 * size + 1, size)
    assert list(bank.loaded) == names(3)[::-1]
    assert bank.counters.bytes == 3 * size
    read = Bank(model, tmp_path)
    for name in names(3):
        for path, adapter in read.take(name).layers.items():
            mine = bank.loaded[name].layers[path]
            assert np.array_equal(mine.A.data, adapter.A.data)
            assert np.array_equal(mine.B.data, adapter.B.data)
            assert mine.scale == adapter.scale
    assert list(resident(model, tmp_path, 1, size - 1, size).loaded) == []
    assert bank.take(names(5)[4]).bytes == size
    assert names(3)[2] not in bank.loaded


def test_requests_are_submitted_when_they_arrive(tmp_path):
    model = base()
    engine = Engine(model, Bank(model, write(tmp_path, names=("a",))), slots=2)
    requests = workload(np.random.default_rng(0), 4, 0, 1.0, 11)
    requests = [type(r)(r.prompt[:3], 2, "a", temperature=0) for r in requests]
    arrivals = [0.0, 0.0, 0.05, 0.1]
    start = time.perf_counter()
    streams = play(engine, arrivals, requests)
    assert all(len(stream.tokens) == 2 for stream in streams)
    for at, stream in zip(arrivals, streams, strict=True):
        assert stream.times[0] - start >= at


def test_a_round_has_the_same_texts_for_all_and_turns_go_forwards_and_backwards(tmp_path, monkeypatch):
    save_model(base(np.float32), tmp_path / "base", "")
    monkeypatch.setattr(bench, "PROMPT", (1, 3))
    monkeypatch.setattr(bench, "NEW", (2, 5))
    seen = []

    def watched(name, real):
        def call(trial, *given):
            requests = given[-1]
            seen.append((name, trial.adapters, [(r.prompt.tolist(), r.max_new_tokens) for r in requests]))
            return real(trial, *given)

        monkeypatch.setattr(bench.Trial, name, call)

    for name in ("warm", "burst", "trickle"):
        watched(name, getattr(bench.Trial, name))
    serve_bench(tmp_path / "base", (1, 3), rank=2, slots=2, requests=6, rounds=2)
    assert [(name, n) for name, n, _ in seen] == [
        *((name, n) for name in ("warm", "burst", "trickle") for n in (0, 1, 3)),
        *((name, n) for name in ("burst", "trickle") for n in (3, 1, 0)),
    ]
    for at in range(3, len(seen), 3):
        assert seen[at][2] == seen[at + 1][2] == seen[at + 2][2]
    assert len({str(texts) for _, _, texts in seen[3::3]}) == 4


def test_requests_arrive_at_a_share_of_the_bases_rate_and_ratios_are_to_the_base(tmp_path, monkeypatch):
    """The last of n arrivals is a sum of n waits: off by 5 standard deviations once in a million times."""
    save_model(base(np.float32), tmp_path / "base", "")
    monkeypatch.setattr(bench, "PROMPT", (1, 3))
    monkeypatch.setattr(bench, "NEW", (2, 5))
    n, seen, warmed = 1000, [], []

    def warm(trial, requests):
        warmed.append(len(requests))

    def burst(trial, requests):
        trial.throughput.append(700.0 / (1 + trial.adapters))
        trial.requests += len(requests)

    def trickle(trial, arrivals, requests):
        seen.append((arrivals, trial.engine))
        trial.first, trial.last = list(range(101)), list(range(0, 202, 2))

    for name, fake in (("warm", warm), ("burst", burst), ("trickle", trickle)):
        monkeypatch.setattr(bench.Trial, name, fake)
    how = {"rank": 3, "targets": ["q_proj"], "slots": 5, "requests": n, "load": 0.3, "rounds": 1}
    result = serve_bench(tmp_path / "base", (3,), **how)
    assert [row.to_base for row in result.rows] == [1, 0.25]
    assert seen[0][0] == seen[1][0]
    rate = 0.3 * 700 / 3.5  # requests per second: of 2 to 5 tokens
    assert abs(seen[0][0][-1] * rate / n - 1) <= 5 / np.sqrt(n)
    assert [(engine.queue, len(engine.free), engine.positions) for _, engine in seen] == [(n, 5, 8)] * 2
    maps = [layer.weight.shape for path, layer in bases(base()).items() if "q_proj" in path]
    assert result.bytes == 4 * 3 * sum(map(sum, maps))
    assert [(row.first_token, row.latency) for row in result.rows] == [((50, 95), (100, 190))] * 2
    serve_bench(tmp_path / "base", (3,), **how | {"requests": 4, "budget": result.bytes})
    assert warmed == [5, 5, 4, 4]


def test_what_is_read_and_evicted_before_measuring_does_not_count(tmp_path):
    model = base()
    engine = Engine(model, Bank(model, write(tmp_path, names=("a", "e")), bytes_of("e")), slots=1)
    trial = bench.Trial(2, engine)
    trial.warm([Request((1,), 1, name, temperature=0) for name in "ae"])
    trial.burst([Request((1,), 1, name, temperature=0) for name in "ea"])
    trial.first = trial.last = [0.0]
    row = trial.row(trial)
    assert (row.in_memory, row.evictions) == (0.5, 1)


def test_a_stream_that_fails_fails_the_benchmark(tmp_path):
    model = base()
    engine = Engine(model, Bank(model, write(tmp_path, names=("a",))), slots=1)
    (tmp_path / "a" / WEIGHTS).write_bytes(b"")
    with pytest.raises(FormatError):
        play(engine, [0.0], [Request((1,), 2, "a", temperature=0)])


def test_what_cannot_be_measured_is_refused_before_any_adapter_is_written(tmp_path, monkeypatch):
    save_model(base(np.float32), tmp_path / "base", "")
    monkeypatch.setattr(bench, "write_adapters", None)
    how = {"adapters": (1,), "requests": 2}
    with pytest.raises(ConfigError, match="takes 16 tokens; expected at least 80, the longest text"):
        serve_bench(tmp_path / "base", **how)
    monkeypatch.setattr(bench, "PROMPT", (1, 3))
    monkeypatch.setattr(bench, "NEW", (2, 5))
    with pytest.raises(ConfigError, match=r"budget is 99 bytes; expected at least [0-9,]+, those of one"):
        serve_bench(tmp_path / "base", **how, budget=99)


def test_the_report_has_a_line_for_each_number_of_adapters(tmp_path):
    save_model(base(np.float32), tmp_path / "base", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PROMPT", (1, 3))
        patch.setattr(bench, "NEW", (2, 5))
        seen = []
        result = serve_bench(
            tmp_path / "base", (1, 3), rank=2, slots=2, requests=6, rounds=2, budget=20_000, seed=1,
            progress=lambda done, known: seen.append((done, known)),
        )  # fmt: skip
    assert [row.adapters for row in result.rows] == [0, 1, 3]
    assert seen == [(done, 12) for done in range(1, 13)]
    assert result.rows[0].to_base == 1
    for row in result.rows:
        assert 0 < row.first_token[0] <= row.first_token[1] <= row.latency[1]
        assert row.tokens_per_second > 0
        assert row.in_memory == 1
    assert result.data()["rows"][2]["adapters"] == 3
    assert str(result).splitlines()[1].split()[0] == "none"
    assert f"{result.bytes:,} bytes each" in str(result)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"adapters": ()}, "adapters is"), ({"adapters": (0,)}, "adapters is"), ({"load": 0}, "load is"),
        ({"zipf": -1}, "zipf is"), ({"requests": 0}, "requests is"), ({"rounds": 0}, "rounds is"),
        ({"rank": 0}, "r is"), ({"slots": 0}, "slots is"), ({"budget": 0}, "budget is"),
    ],
)  # fmt: skip
def test_numbers_without_a_meaning_are_refused(wrong, says, tmp_path):
    save_model(base(np.float32), tmp_path / "base", "")
    with pytest.raises(ConfigError, match=says):
        serve_bench(tmp_path / "base", **{"requests": 2, "adapters": (1,)} | wrong)

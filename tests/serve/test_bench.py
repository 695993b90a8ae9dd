"""The benchmark's workload is what it says, and its report has a line for each number of adapters."""

import time
from collections import Counter

import numpy as np
import pytest
from served import base, write

from minilora.errors import ConfigError
from minilora.formats.huggingface import save_model
from minilora.methods.lora_config import LoraConfig
from minilora.serve.bank import Bank
from minilora.serve.bench import (
    NEW,
    PROMPT,
    names,
    play,
    resident,
    serve_bench,
    workload,
    write_adapters,
)
from minilora.serve.engine import Engine


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
    size = write_adapters(model, tmp_path, 5, config, np.random.default_rng(0))
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
    arrays = {id(a.A.data) for one in bank.loaded.values() for a in one.layers.values()}
    assert len(arrays) == 3 * len(adapter_paths(read))
    assert list(resident(model, tmp_path, 1, size - 1, size).loaded) == []
    assert bank.take(names(5)[4]).bytes == size
    assert names(3)[2] not in bank.loaded


def adapter_paths(bank):
    return next(iter(bank.loaded.values())).layers


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


def test_the_report_has_a_line_for_each_number_of_adapters(tmp_path):
    save_model(base(np.float32), tmp_path / "base", "")
    import minilora.serve.bench as bench

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

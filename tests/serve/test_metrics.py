"""What /metrics says is read by Prometheus' own parser, and is what has happened."""

import asyncio
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import base, write

from minilora.serve.bank import Bank
from minilora.serve.engine import REASONS, Engine, Request
from minilora.serve.metrics import SECONDS, Histogram, Metrics
from minilora.serve.openai import Asked
from minilora.serve.service import Text

parser = pytest.importorskip("prometheus_client.parser")


def samples(text):
    """name -> {label value: number}, read strictly: every sample belongs to a family of its kind."""
    families = list(parser.text_string_to_metric_families(text))
    assert all(family.documentation and family.type != "unknown" for family in families)
    assert len({family.name for family in families}) == len(families)
    found = {}
    for family in families:
        kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
        for sample in family.samples:
            assert sample.name.removeprefix(family.name) in kinds[family.type]
            assert sample.name.endswith("_total") is (family.type == "counter")
            assert sample.name.startswith(family.name)
            (label,) = sample.labels.values() or [""]
            found.setdefault(sample.name, {})[label] = sample.value
    return found


@given(values=st.lists(st.floats(0, 1000) | st.sampled_from(SECONDS)))
def test_a_bucket_counts_what_is_at_most_its_bound(values):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    found = {(name, label): n for name, label, n in histogram.samples()}
    for bound in SECONDS:
        assert found["_bucket", f'{{le="{bound}"}}'] == sum(value <= bound for value in values)
    assert found["_bucket", '{le="+Inf"}'] == found["_count", ""] == len(values)
    error = len(values) * 2.0**-53 * math.fsum(values)  # of adding them one by one
    assert abs(found["_sum", ""] - math.fsum(values)) <= error


def test_the_text_is_what_the_engine_and_its_bank_have_done(tmp_path):
    model = base()
    engine = Engine(model, Bank(model, write(tmp_path, names=("a", "b"))), slots=3)
    metrics = Metrics(engine)
    for name in ("a", "b", "a", None):
        engine.submit(Request([1, 2], 3, name))
    found = samples(metrics.text())
    assert found["minilora_requests_waiting"] == {"": 4}
    assert found["minilora_requests_running"] == {"": 0}
    engine.step()
    found = samples(metrics.text())
    assert found["minilora_requests_waiting"] == {"": 4 - len(engine.running)}
    assert found["minilora_requests_running"] == {"": len(engine.running)}
    assert len(engine.running) > 0
    slot = engine.free.pop()  # for a moment a slot is neither free nor in use
    assert samples(metrics.text())["minilora_slots"] == {"": 3}
    engine.free.append(slot)
    engine.run()
    metrics.finished["length"] += 4
    metrics.refused[429] += 2
    metrics.first.add(0.02)
    metrics.whole.add(3)
    found = samples(metrics.text())
    assert found["minilora_slots"] == {"": 3}
    assert found["minilora_tokens_total"] == {"prompt": 8, "generated": 12}
    assert found["minilora_steps_total"] == {"": engine.counters.steps}
    assert found["minilora_requests_total"] == dict.fromkeys(REASONS, 0) | {"length": 4}
    assert found["minilora_refused_total"] == {"429": 2}
    counters = engine.bank.counters
    for name in ("hits", "misses", "loads", "evictions"):
        assert found[f"minilora_adapter_{name}_total"] == {"": getattr(counters, name)}
    assert counters.hits + counters.misses == 3
    assert found["minilora_adapter_bytes"] == {"": counters.bytes}
    assert found["minilora_adapter_budget_bytes"] == {"": 1 << 30}
    assert found["minilora_first_token_seconds_sum"] == {"": 0.02}
    assert found["minilora_first_token_seconds_bucket"]["0.025"] == 1
    assert found["minilora_request_seconds_sum"] == {"": 3}
    assert found["minilora_request_seconds_count"] == {"": 1}


def test_seconds_go_from_arrival_to_the_first_token_and_to_the_end_of_the_answer():
    metrics = Metrics(Engine(base()))
    service = SimpleNamespace(metrics=metrics, engine=SimpleNamespace(clock=lambda: 20.0))
    for times in ([1.0, 3.0, 9.0], [5.0]):  # the second has no token
        stream = SimpleNamespace(times=times, finish_reason="length")
        Text(service, Asked("a"), stream, asyncio.Event(), reason="length").end()
    assert (metrics.first.sum, sum(metrics.first.counts)) == (2, 1)
    assert (metrics.whole.sum, sum(metrics.whole.counts)) == (19 + 15, 2)
    assert metrics.finished["length"] == 2


def test_without_adapters_there_is_no_metric_of_them():
    found = samples(Metrics(Engine(base())).text())
    assert not [name for name in found if "adapter" in name]

"""Texts of different lengths in one cache: each is what it is alone, whoever shares the steps."""

import math

import numpy as np
import pytest
from helpers import SIZES, assert_precision_scales, seeds, tiny
from hypothesis import example, given
from hypothesis import strategies as st

from minilora.backend import to_device, to_host, xp
from minilora.ops import attend_one
from minilora.serve.slots import Span, slots_of

V, S = SIZES["vocab_size"], SIZES["max_position_embeddings"]
R = 4


@st.composite
def schedules(draw):
    """Slot -> ids, and steps of spans that read each text to its end; spans of one step in any order."""
    slots = draw(st.lists(st.integers(0, R - 1), min_size=1, max_size=R, unique=True))
    texts = {slot: draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=9)) for slot in slots}
    seen, steps = dict.fromkeys(slots, 0), []
    while left := [slot for slot in slots if seen[slot] < len(texts[slot])]:
        chosen = draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        spans = []
        for slot in chosen:
            count = draw(st.integers(1, len(texts[slot]) - seen[slot]))
            spans.append(Span(slot, seen[slot], count))
            seen[slot] += count
        steps.append(spans)
    return texts, steps


@pytest.mark.parametrize("alone", [False, True])
def test_only_the_rows_that_are_asked_for_get_logits(alone):
    spans, ids = [Span(2, 0, 3), Span(0, 0, 1), Span(1, 0, 2)], np.arange(1, 7)[:, None]

    def both(dtype):
        model, _ = tiny(0, dtype)
        for rows in (None, to_device(np.array([2, 3, 5]))):
            logits, _ = model.forward(to_device(ids), past=slots_of(model, R, S).step(spans, alone, rows))
            assert logits.shape == (6 if rows is None else 3, 1, V)
            yield logits[[2, 3, 5]] if rows is None else logits

    assert_precision_scales(both)


def through(model, texts, steps, alone=False, slots=None):
    """(slot, position) -> logits (V,) of every token, by steps over slots."""
    slots = slots or slots_of(model, R, S)
    found = {}
    for spans in steps:
        ids = [texts[s.slot][s.start : s.start + s.length] for s in spans]
        logits, _ = model.forward(to_device(np.concatenate(ids)[:, None]), past=slots.step(spans, alone))
        keys = [(s.slot, s.start + i) for s in spans for i in range(s.length)]
        found |= dict(zip(keys, to_host(logits)[:, 0], strict=True))
    return found


APART = ({0: [1], 1: [2, 3], 2: [4]}, [[Span(0, 0, 1), Span(1, 0, 2), Span(2, 0, 1)]])
UNORDERED = ({0: [1, 2], 1: [3, 4], 2: [5, 6]}, [[Span(slot, at, 1) for slot in (2, 0, 1)] for at in (0, 1)])


@given(seed=seeds, schedule=schedules(), alone=st.booleans())
@example(seed=0, schedule=APART, alone=False)
@example(seed=0, schedule=UNORDERED, alone=False)  # every slot has a token, in another order than the slots'
def test_every_token_has_the_logits_of_its_text_alone(seed, schedule, alone):
    """However the texts are cut into spans, and whatever lies in the other slots."""
    texts, steps = schedule

    def both(dtype):
        model, _ = tiny(seed, dtype)
        found = through(model, texts, steps, alone)
        whole = {slot: to_host(model(to_device(np.array([ids])))[0])[0] for slot, ids in texts.items()}
        assert len(found) == sum(map(len, texts.values()))
        yield to_device(np.stack(list(found.values())))
        yield to_device(np.stack([whole[slot][position] for slot, position in found]))

    assert_precision_scales(both)


@given(seed=seeds, schedule=schedules())
def test_by_itself_a_token_attends_the_same_to_the_bit_in_any_company(seed, schedule):
    texts, steps = schedule
    rng = np.random.default_rng(seed)
    model, _ = tiny(seed, np.float32)
    c = model.config
    q, k, v = (
        {(slot, p): rng.standard_normal((1, heads, 1, c.E)).astype(np.float32)
         for slot, ids in texts.items() for p in range(len(ids))}
        for heads in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    )  # fmt: skip

    def run(steps):
        slots, found = slots_of(model, R, S), {}
        for spans in steps:
            keys = [(s.slot, s.start + i) for s in spans for i in range(s.length)]
            cache = slots.step(spans, alone=True).caches[1]
            y, _ = cache.attend(*(to_device(np.concatenate([one[key] for key in keys])) for one in (q, k, v)))
            found |= dict(zip(keys, to_host(y), strict=True))
        return found

    together = run(steps)
    for slot, ids in texts.items():
        for key, y in run([[Span(slot, 0, len(ids))]]).items():
            assert np.array_equal(together[key], y), key


@given(seed=seeds, n=st.integers(1, 4), s=st.integers(2, 9))
def test_what_lies_behind_a_mask_changes_no_bit(seed, n, s):
    """Masked scores have weight exp(-inf) = 0, and 0 times a finite value is 0."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape) for shape in ((n, 6, 1, 4), (n, 2, s, 4), (n, 2, s, 4)))
    lengths = rng.integers(1, s + 1, n)
    behind = np.arange(s) >= lengths[:, None]
    mask = np.where(behind, -np.inf, 0)[:, None, None]

    def attended(fill):
        a, b = k.copy(), v.copy()
        a.swapaxes(1, 2)[behind], b.swapaxes(1, 2)[behind] = fill, fill
        return to_host(attend_one(*map(to_device, (q, a, b, mask))))

    assert np.array_equal(attended(0), attended(1e300))


def test_a_cleared_slot_leaves_nothing_to_the_next_text_not_even_nan():
    model, _ = tiny(0)
    slots = slots_of(model, 2, S)
    for span in (Span(1, 0, 4), Span(1, 4, 1)):  # which may fail and be computed again
        slots.step([span])
        slots.k[:, 1, :, span.start : span.start + span.length] = math.nan
        slots.v[:, 1, :, span.start : span.start + span.length] = math.nan
    slots.step([Span(1, 2, 1)])
    slots.clear(1)
    assert not np.asarray(to_host(slots.k)).any()
    assert not np.asarray(to_host(slots.v)).any()
    texts, steps = {0: [1, 2, 3], 1: [4]}, [[Span(0, 0, 2)], [Span(0, 2, 1), Span(1, 0, 1)]]
    assert all(np.isfinite(z).all() for z in through(model, texts, steps, slots=slots).values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slots_have_the_dtype_of_the_model_and_are_allocated_once(dtype):
    model, _ = tiny(0, dtype)
    slots = slots_of(model, R, S)
    c = model.config
    assert slots.k.shape == slots.v.shape == (c.num_hidden_layers, R, c.num_key_value_heads, S, c.E)
    step = slots.step([Span(2, 0, 3), Span(0, 0, 1)])
    assert {table.dtype for table in step.turn(1)} == {slots.k.dtype} == {np.dtype(dtype)}
    assert all(cache.k.base is not None for cache in step.caches) or xp.ndarray is not np.ndarray

"""Every request gets what it would get alone, whoever shares its steps; nobody is lost, nothing is left."""

import gc
import shutil
import sys
import threading

import numpy as np
import pytest
from helpers import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.numpy import load_file, save_file
from served import RANKS, adapted, base, bytes_of, write

from minilora.backend import to_host
from minilora.decoding import generate
from minilora.errors import BusyError, ConfigError, InputError, NonFiniteError, StateError
from minilora.lora import inject, merge
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.peft.folder import WEIGHTS
from minilora.peft.loading import save_adapter
from minilora.serve import engine as engine_module
from minilora.serve.bank import Bank
from minilora.serve.engine import REASONS, Engine, Request
from minilora.tree import digest, freeze, named_params, replica

NAMES = [None, *RANKS]
V, S = 11, 16
MODELS = {name: adapted(name) for name in NAMES}
SMALL = {"slots": 3, "queue": 100, "chunk": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    return write(tmp_path_factory.mktemp("float32"), np.float32)


def engine(folder, budget=1 << 20, dtype=np.float64, **how):
    model = base(dtype)
    return Engine(model, Bank(model, folder, budget), **SMALL | how)


def played(served, plan):
    """The streams of (request, steps after it), served to their ends."""
    streams = []
    for request, steps in plan:
        streams.append(served.submit(request))
        for _ in range(steps):
            served.step()
    served.run()
    return streams


def alone(request):
    """The tokens that `generate` gives for a request by itself, up to a stop."""
    rng = np.random.default_rng(request.seed)
    ids = np.array([request.prompt])
    how = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
    tokens = []
    for token in generate(MODELS[request.adapter], ids, request.max_new_tokens, rng=rng, **how):
        if int(token[0]) in request.stops:
            break
        tokens.append(int(token[0]))
    return tokens


@st.composite
def requests(draw, greedy=None):
    prompt = tuple(draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=9)))
    cold = draw(st.booleans()) if greedy is None else greedy
    return Request(
        prompt,
        draw(st.integers(1, S - len(prompt) if len(prompt) > 9 else 7)),
        draw(st.sampled_from(NAMES)),
        temperature=0 if cold else draw(st.sampled_from([0.5, 1.0, 2])),
        top_k=draw(st.none() | st.integers(1, V)),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        seed=draw(st.integers(0, 9)),
        stops=draw(st.frozensets(st.integers(0, V - 1), max_size=2)),
    )


def assert_whole(served):
    """Nothing runs or waits; every slot is free and zero, every adapter given back, every request counted."""
    assert not served.running
    assert not served.waiting
    assert sorted(served.free) == list(range(served.cache.k.shape[1]))
    assert not to_host(served.cache.k).any()
    assert not to_host(served.cache.v).any()
    assert all(loaded.users == 0 for loaded in served.bank.loaded.values())


@given(plan=st.lists(st.tuples(requests(), st.integers(0, 3)), min_size=1, max_size=9))
@settings(max_examples=10)
def test_a_request_gets_the_tokens_that_it_would_get_alone(folder, plan):
    """In float64: what its neighbours change is rounding, far below the gap between two logits here."""
    served = engine(folder)
    streams = played(served, plan)
    for stream in streams:
        assert stream.tokens == alone(stream.request)
        assert stream.finish_reason == (
            "length" if len(stream.tokens) == stream.request.max_new_tokens else "stop"
        )
        assert len(stream.times) == 1 + len(stream.tokens)
        assert stream.times == sorted(stream.times)
        assert stream.error is None
    assert_whole(served)
    new, read = sum(len(s.tokens) for s in streams), sum(len(s.prompt) for s in streams)
    assert (served.counters.new_tokens, served.counters.prompt_tokens) == (new, read)
    assert sum(served.counters.finished.values()) == len(streams)


def test_the_adapters_here_write_different_texts():
    texts = {tuple(alone(Request((1, 2, 3), 7, name, temperature=0))) for name in NAMES}
    assert len(texts) == len(NAMES)


# ---- the life of an engine


class Life(RuleBasedStateMachine):
    """Requests, good and bad, come, run, are cancelled; the folder of "bad" is damaged."""

    @initialize(budget=st.sampled_from([9_000, 14_000, 1 << 20]))
    def open(self, budget):
        self.served = engine(self.folder, budget, queue=4)
        self.before = digest(self.served.model)
        self.streams, self.refused = [], 0

    @rule(request=requests(greedy=True))
    def submit(self, request):
        waiting = self.served.queued()
        try:
            self.streams.append(self.served.submit(request))
            assert waiting < 4
        except BusyError:
            assert waiting == 4
            self.refused += 1

    @rule(data=st.data())
    def bad(self, data):
        wrong = data.draw(st.sampled_from([
            Request((), 1), Request((V,), 1), Request((-1,), 1), Request((1.0,), 1), Request((1,), 0),
            Request((1,), S), Request((1,), 1, "nobody"), Request((1,), 1, "../a"), Request((1,), 1, 3),
            Request((1,), 1, temperature=-1), Request((1,), 1, top_p=0), Request((1,), 1, top_k=0),
            Request((1,), 1, stops=None), Request((1,), 1, stops={1}), Request((1,), 1, stops=frozenset("a")),
            Request((1,), 1, seed=-1), Request(((1,), (2,)), 1), Request((1,), 1, temperature=float("nan")),
        ]))  # fmt: skip
        before = self.served.queued(), len(self.served.running)
        with pytest.raises(InputError):
            self.served.submit(wrong)
        assert before == (self.served.queued(), len(self.served.running))

    @precondition(lambda self: self.served.queued() < 4)
    @rule()
    def damaged(self):
        self.streams.append(self.served.submit(Request((1, 2), 3, "bad", temperature=0)))

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def cancel(self, data):
        self.served.cancel(data.draw(st.sampled_from(self.streams)))

    @rule()
    def step(self):
        self.served.step()

    @invariant()
    def nobody_is_lost(self):
        if not hasattr(self, "served"):
            return
        served = self.served
        waiting = [stream for line in served.waiting.values() for stream in line]
        running = [row.stream for row in served.running.values()]
        ended = [stream for stream in self.streams if stream.finish_reason]
        assert sorted(map(id, [*waiting, *running, *ended])) == sorted(map(id, self.streams))
        assert sorted([*served.free, *served.running]) == list(range(SMALL["slots"]))
        assert served.bank.counters.bytes <= served.bank.budget
        users = sum(loaded.users for loaded in served.bank.loaded.values())
        assert users == sum(stream.request.adapter is not None for stream in running)
        assert sum(served.counters.finished.values()) == len(ended)
        assert served.counters.refused == self.refused

    def teardown(self):
        if not hasattr(self, "served"):
            return
        self.served.run()
        assert_whole(self.served)
        for stream in self.streams:
            assert stream.finish_reason in REASONS
            assert (stream.error is not None) is (stream.finish_reason == "error")
            if stream.request.adapter == "bad":
                assert stream.finish_reason in ("error", "cancelled")
            elif stream.finish_reason == "cancelled":
                assert stream.tokens == alone(stream.request)[: len(stream.tokens)]
            elif stream.finish_reason == "error":  # e is larger than the smallest budget
                assert "the budget" in str(stream.error)
            else:
                assert stream.tokens == alone(stream.request)
        assert digest(self.served.model) == self.before


def test_nobody_is_lost_and_slots_and_adapters_come_back(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "all")
    shutil.copytree(folder / "a", tmp_path / "all" / "bad")
    (tmp_path / "all" / "bad" / WEIGHTS).write_bytes(b"")
    Life.folder = tmp_path / "all"
    case = Life.TestCase
    case.settings = settings(max_examples=9, stateful_step_count=25)
    case().runTest()


# ---- errors


def test_a_full_queue_refuses_by_number(folder):
    served = engine(folder, queue=2)
    streams = [served.submit(Request((1,), 1)) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests are waiting; expected fewer than 2; try again later"):
        served.submit(Request((1,), 1))
    served.run()
    assert [len(stream.tokens) for stream in streams] == [1, 1]
    served.submit(Request((1,), 1))


def test_an_adapter_whose_logits_overflow_ends_its_own_request_only(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "all")
    tensors = load_file(tmp_path / "all" / "a" / WEIGHTS)
    save_file({name: t * 1e150 for name, t in tensors.items()}, tmp_path / "all" / "a" / WEIGHTS)
    served = engine(tmp_path / "all")
    streams = [
        served.submit(Request((1, 2, 3), 5, name, temperature=0)) for name in ("b", "a", None, "c", "a")
    ]
    served.run()
    for stream in streams:
        if stream.request.adapter == "a":
            assert isinstance(stream.error, NonFiniteError)
            assert "not finite, with adapter 'a'" in str(stream.error)
            assert not stream.tokens
        else:
            assert stream.tokens == alone(stream.request)
    assert_whole(served)


def test_an_error_of_a_step_ends_its_texts_and_the_engine_goes_on(folder, monkeypatch):
    served = engine(folder)
    streams = [served.submit(Request((1, 2), 4, temperature=0)) for _ in range(2)]
    served.step()

    def fail(*_, **__):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(served.replica, "forward", fail)
        served.step()
    assert [str(stream.error) for stream in streams] == ["no memory"] * 2
    assert [stream.finish_reason for stream in streams] == ["error"] * 2
    with pytest.raises(MemoryError):
        list(streams[0])
    again = served.submit(Request((1, 2), 4, temperature=0))
    served.run()
    assert again.tokens == alone(again.request)
    assert_whole(served)


def broken(*_, **__):
    raise ZeroDivisionError("broken")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("part", ["leave", "join", "unqueue", "forward", "extend", "end", "clear", "give"])
def test_an_error_that_is_nobodys_ends_all_streams_and_the_engine_refuses(
    folder, part, threaded, monkeypatch
):
    served = engine(folder, slots=2)
    streams = [served.submit(Request((1, 2), 4, name, temperature=0)) for name in reversed(NAMES)]
    monkeypatch.setattr({"clear": served.cache, "give": served.bank}.get(part, served), part, broken)
    if threaded:
        served.start()
    else:
        with pytest.raises(ZeroDivisionError):
            served.run()
    for stream in streams:
        with pytest.raises(StateError, match="the engine has failed and takes no more requests"):
            list(stream)
        assert stream.finish_reason == "error"
        assert isinstance(stream.error.__cause__, ZeroDivisionError)
        served.cancel(stream)
    with pytest.raises(StateError, match="the engine has failed"):
        served.submit(Request((1,), 1))
    served.stop()
    assert not served.busy()
    assert served.counters.finished == dict.fromkeys(REASONS, 0) | {"error": len(streams)}


def test_a_listener_that_leaves_the_program_leaves_no_stream_without_an_end(folder):
    served = engine(folder)
    streams = [served.submit(Request((1, 2), 4), sys.exit) for _ in range(3)]
    with pytest.raises(SystemExit):
        served.run()
    assert [stream.finish_reason for stream in streams] == ["error"] * 3


def test_an_error_in_sampling_ends_its_text_only(folder, monkeypatch):
    served, real = engine(folder), engine_module.sample
    monkeypatch.setattr(
        engine_module, "sample", lambda z, rng, t, *more: broken() if t == 2 else real(z, rng, t, *more)
    )
    good, bad = (served.submit(Request((1, 2), 4, "a", temperature=t)) for t in (0, 2))
    served.run()
    assert isinstance(bad.error, ZeroDivisionError)
    assert good.tokens == alone(good.request)
    assert_whole(served)


def test_a_temperature_near_zero_is_greedy(folder):
    served = engine(folder)
    streams = [served.submit(Request((1, 2), 7, "b", temperature=t)) for t in (0, 1e-308, 5e-324)]
    served.run()
    assert streams[0].tokens == streams[1].tokens == streams[2].tokens


def test_only_a_stream_of_this_engine_is_cancelled(folder):
    served, other = engine(folder), engine(folder)
    for wrong in (other.submit(Request((1,), 1)), None, "a"):
        with pytest.raises(InputError, match="is no stream of this engine"):
            served.cancel(wrong)
    assert not served.busy()


def test_what_is_cancelled_over_and_over_is_noted_once_and_not_at_all_when_it_has_ended(folder):
    served = engine(folder)
    stream = served.submit(Request((1,), 1))
    for _ in range(9):
        served.cancel(stream)
    assert len(served.cancelled) == 1
    served.stop()
    served.cancel(stream)
    assert not served.cancelled


def test_a_stream_that_nobody_computes_says_so(folder):
    served = engine(folder)
    stream, caught = served.submit(Request((1, 2), 2, temperature=0)), []

    def read():
        with pytest.raises(StateError, match="the engine has not been started"):
            next(iter(stream))
        caught.append(True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert caught
    served.run()
    assert list(stream) == alone(stream.request)


def test_who_is_told_of_the_end_finds_the_slot_free_and_the_adapter_given_back(folder):
    served, seen = engine(folder, slots=1), []

    def told():
        seen.append((len(served.free), served.bank.loaded["a"].users, served.counters.finished["length"]))

    served.submit(Request((1,), 3, "a", temperature=0), told)
    served.run()
    assert seen == [(0, 1, 0), (0, 1, 0), (1, 0, 1)]


def test_a_listener_that_fails_ends_nothing(folder):
    served, calls = engine(folder), []

    def gone():
        calls.append(1)
        raise RuntimeError("the loop is closed")

    stream = served.submit(Request((1, 2), 4, temperature=0), gone)
    served.run()
    assert (len(calls), stream.tokens) == (1, alone(stream.request))


def test_a_merged_model_is_not_served_and_an_engine_without_a_bank_has_no_adapters():
    model = base()
    inject(model, LoraConfig(r=2), rng=np.random.default_rng(0))
    merge(model)
    with pytest.raises(StateError, match="merged"):
        Engine(model)
    with pytest.raises(InputError, match="there is no adapter 'a'"):
        Engine(base(), slots=1).submit(Request((1,), 1, "a"))
    for name in ("slots", "positions", "queue", "chunk"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            Engine(base(), **{name: 0})


def test_the_prompt_is_that_of_the_moment_of_submitting(folder):
    served, prompt = engine(folder), [1, 2, 3]
    stream = served.submit(Request(prompt, 3, temperature=0))
    prompt[0] = 7
    served.run()
    assert stream.tokens == alone(Request((1, 2, 3), 3, temperature=0))


# ---- turns


@pytest.fixture(scope="module")
def damaged(folder, tmp_path_factory):
    """A folder in which the adapter "bad" is damaged."""
    place = tmp_path_factory.mktemp("damaged") / "all"
    shutil.copytree(folder, place)
    shutil.copytree(folder / "a", place / "bad")
    (place / "bad" / WEIGHTS).write_bytes(b"")
    return place


@given(
    floods=st.dictionaries(st.sampled_from([None, *"abcd", "bad"]), st.integers(1, 6), min_size=1),
    slots=st.integers(1, 4),
    budget=st.sampled_from([bytes_of("e"), bytes_of("e") + bytes_of("a"), 1 << 20]),
    longest=st.integers(1, 3),
    seed=seeds,
)
@settings(max_examples=9)
def test_a_lone_request_waits_for_the_longest_text_once_for_each_adapter_ahead_and_once_more(
    damaged, floods, slots, budget, longest, seed
):
    """However many the others are, before and after, damaged or not, and whether there is room for them."""
    served, rng = engine(damaged, budget, slots=slots), np.random.default_rng(seed)

    def flood(names):
        for name in names:
            new = int(rng.integers(1, longest + 1))  # and a prompt of one token: so many steps in a slot
            served.submit(Request((1,), new, name, temperature=0))

    others = [name for name, count in floods.items() for _ in range(count)]
    flood(others[i] for i in rng.permutation(len(others)))
    served.step()
    ahead, steps = len(served.waiting), 0
    lone = served.submit(Request((1,), 1, "e", temperature=0))
    while not lone.tokens:
        flood(floods if served.queued() < 20 else ())
        served.step()
        steps += 1
        assert steps <= (ahead + 1) * longest
    served.run()
    assert_whole(served)


def test_a_damaged_adapter_with_many_requests_holds_up_nobody(damaged):
    served = engine(damaged, slots=2)
    for _ in range(50):
        served.submit(Request((1,), 1, "bad", temperature=0))
    others = [served.submit(Request((1,), 1, name, temperature=0)) for name in (None, "a")]
    served.step()
    assert others[0].tokens
    served.step()
    assert others[1].tokens


def test_an_adapter_without_room_holds_up_no_request_for_the_base_and_keeps_a_slot(folder):
    served = engine(folder, bytes_of("e"), slots=4)
    running = served.submit(Request((1,), 9, "e", temperature=0))
    served.step()
    waits, again = (served.submit(Request((1,), 1, name, temperature=0)) for name in "ae")
    bases = [served.submit(Request((1,), 1, temperature=0)) for _ in range(6)]
    served.step()
    assert [len(stream.tokens) for stream in bases] == [1, 0, 0, 0, 0, 0]  # two slots are kept for a and e
    while running.finish_reason is None:
        assert not waits.tokens
        served.step()
    served.step()
    assert waits.tokens
    assert not again.tokens
    served.run()
    assert again.tokens


def test_a_cancelled_request_costs_its_adapter_no_turn(folder):
    served = engine(folder, slots=1)
    served.submit(Request((1,), 1, temperature=0))
    served.step()
    first, second, other = (served.submit(Request((1,), 1, name, temperature=0)) for name in "aab")
    served.cancel(second)
    served.run()
    assert first.times[1] < other.times[1]


def test_a_text_takes_the_lowest_free_slot(folder):
    """Attention is computed up to the last slot that is taken."""
    served = engine(folder)
    streams = [served.submit(Request((1,), n, temperature=0)) for n in (2, 2, 9)]
    served.step()
    assert {slot: row.stream for slot, row in served.running.items()} == dict(enumerate(streams))
    for _ in range(2):
        served.step()
    streams.append(served.submit(Request((1,), 9, temperature=0)))
    served.step()
    assert served.running[0].stream is streams[3]
    assert sorted(served.running) == [0, 2]


@pytest.mark.parametrize("slots", [2, 3])
def test_prompts_are_read_in_the_order_of_their_coming(folder, slots):
    """A long prompt in a high slot is not overtaken by those that take the lower ones."""
    served = engine(folder, slots=slots, chunk=2)
    for _ in range(slots - 1):
        served.submit(Request((1,), 2, temperature=0))
    long = served.submit(Request((1,) * 9, 1, temperature=0))
    later = [served.submit(Request((1,) * 9, 1, temperature=0)) for _ in range(4)]
    served.run()
    assert long.times[1] < min(stream.times[1] for stream in later)


def test_requests_of_one_adapter_stay_in_order(folder):
    served = engine(folder, slots=1)
    streams = [served.submit(Request((1,), 1, "a", temperature=0)) for _ in range(5)]
    served.run()
    assert [s.times[1] for s in streams] == sorted(s.times[1] for s in streams)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
@settings(max_examples=8)
def test_a_step_reads_a_token_of_each_running_text_and_a_chunk_of_prompts_at_most(folder, lengths):
    served = engine(folder)
    real, sizes = served.logits, []

    def watched(parts):
        sizes.append([span.length for span, _ in parts])
        assert len(parts) == len(served.running) or sum(c for c in sizes[-1] if c > 1) == SMALL["chunk"]
        decoding = {row.stream for _, row in served.running.items() if row.seen >= len(row.stream.prompt)}
        assert decoding <= {row.stream for _, row in parts}
        return real(parts)

    served.logits = watched
    for n in lengths:
        served.submit(Request((1,) * n, 3, temperature=0))
    served.run()
    assert all(sum(c for c in counts if c > 1) <= SMALL["chunk"] for counts in sizes)
    assert_whole(served)


def test_a_step_reads_one_adapter_at_most_and_reads_ahead_for_those_that_wait(folder):
    served = engine(folder, slots=2)
    streams = [served.submit(Request((1,), 6, name, temperature=0)) for name in "abcde"]
    loads = [0]
    while served.busy():
        served.step()
        loads.append(served.bank.counters.loads)
        assert loads[-1] - loads[-2] <= 1
    assert loads[:6] == [0, 1, 2, 3, 4, 4]  # two as they join, two for those that take the slots next
    assert (served.bank.counters.hits, served.bank.counters.misses) == (3, 2)
    assert all(stream.tokens == alone(stream.request) for stream in streams)


def test_reading_ahead_evicts_nobody_that_waits(folder):
    served = engine(folder, sum(map(bytes_of, "abc")), slots=1)
    for name in "abcdabcd":
        served.submit(Request((1,), 4, name, temperature=0))
    served.run()
    assert_whole(served)
    assert served.bank.counters.loads <= 8
    assert sum(served.counters.finished.values()) == served.counters.finished["length"] == 8


def test_reading_ahead_evicts_nothing_that_the_next_requests_need(folder):
    served = engine(folder, bytes_of("b"), slots=2)
    served.bank.fetch("a")
    for name in (None, None, "a", "b"):
        served.submit(Request((1,), 9, name, temperature=0))
        served.step()
    assert list(served.bank.loaded) == list(served.waiting)[:1] == ["a"]
    served.run()
    assert served.bank.counters.loads == 2


def test_adapters_that_fit_one_at_a_time_are_served_one_after_the_other(folder):
    served = engine(folder, bytes_of("e"))
    streams = [served.submit(Request((1, 2), 4, name, temperature=0)) for name in "ebecad"]
    served.run()
    assert all(stream.tokens == alone(stream.request) for stream in streams)
    assert_whole(served)


# ---- the head


def test_only_the_last_token_of_each_text_goes_through_the_head(folder):
    served = engine(folder, chunk=99)
    head, rows = served.replica.lm_head, []

    def watched(x, need):
        rows.append(len(x))
        return head(x, need)

    served.replica.lm_head = watched
    streams = [served.submit(Request((1, 2, 3, 4), 2, name, temperature=0)) for name in (None, "d")]
    served.run()
    assert rows == [2, 2]
    assert all(stream.tokens == alone(stream.request) for stream in streams)


def test_an_adapter_of_the_head_changes_its_own_texts(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "all")
    model = base()
    inject(model, LoraConfig(r=3, alpha=9, targets=["lm_head"], init="both"), rng=np.random.default_rng(5))
    save_adapter(model, tmp_path / "all" / "head", dtype="float64")
    served = engine(tmp_path / "all", chunk=99)
    streams = [
        served.submit(Request(prompt, 4, name, temperature=0))
        for prompt in ((1, 2, 3, 4), (5, 6, 7), (8, 9), (2, 4, 6, 8, 10))
        for name in (None, "head", "a")
    ]
    served.run()
    for stream in streams:
        if stream.request.adapter == "head":
            tokens = generate(model, stream.prompt[None], 4, rng=None, temperature=0)
            assert stream.tokens == [int(token[0]) for token in tokens]
        else:
            assert stream.tokens == alone(stream.request)


# ---- threads


def test_streams_from_many_threads_and_a_graceful_stop(folder):
    found = {}

    def client(i):
        request = Request((1 + i % 5, 2), 1 + i % 7, NAMES[i % len(NAMES)], temperature=0)
        found[i] = (list(served.submit(request)), request)

    with engine(folder) as served:
        clients = [threading.Thread(target=client, args=(i,)) for i in range(24)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    assert all(tokens == alone(request) for tokens, request in found.values())
    assert len(found) == 24
    assert not served.thread.is_alive()
    assert_whole(served)
    with pytest.raises(StateError, match="stopping"):
        served.submit(Request((1,), 1))
    with pytest.raises(StateError, match="has been started"):
        served.start()


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("finish", [False, True])
def test_stop_finishes_or_cancels_what_is_at_hand(folder, finish, threaded):
    served = engine(folder)
    streams = [served.submit(Request((1, 2), 9, name, temperature=0)) for name in NAMES]
    if threaded:
        began = threading.Event()
        streams.append(served.submit(Request((1,), 5, temperature=0), began.set))
        served.start()
        assert began.wait(30)
    else:
        served.step()
    waited = [] if threaded else [stream for stream in streams if not stream.tokens]
    served.stop(finish)
    assert threaded or all(bool(stream.tokens) is finish for stream in waited)
    reasons = {stream.finish_reason for stream in streams}
    assert reasons <= ({"length"} if finish else {"length", "cancelled"})
    assert finish or threaded or reasons == {"cancelled"}
    assert_whole(served)


def test_who_stops_at_once_is_not_overruled_by_who_lets_texts_end(folder, monkeypatch):
    served = engine(folder)
    stream = served.submit(Request((1, 2), 9, temperature=0))
    with monkeypatch.context() as patch:
        patch.setattr(served, "run", lambda: None)
        served.stop(finish=False)
        served.stop(finish=True)
    served.run()
    assert stream.finish_reason == "cancelled"


def test_an_error_in_the_context_of_an_engine_waits_for_no_text(folder):
    served = engine(folder)
    stopping, real = threading.Event(), served.step
    served.step = lambda: (stopping.wait(30), real())
    stop = served.stop
    served.stop = lambda finish=True: (stopping.set(), stop(finish))
    stream = served.submit(Request((1, 2), 9, temperature=0))
    with pytest.raises(ZeroDivisionError), served:
        broken()
    assert stream.finish_reason == "cancelled"


def test_a_cancelled_stream_ends_at_the_next_step_wherever_it_is(folder):
    served = engine(folder, slots=1)
    runs, waits = (served.submit(Request((1, 2), 9, temperature=0)) for _ in range(2))
    served.step()
    for stream in (runs, waits):
        served.cancel(stream)
        served.cancel(stream)
    served.step()
    assert (runs.finish_reason, waits.finish_reason) == ("cancelled", "cancelled")
    assert (len(runs.tokens), len(waits.tokens)) == (1, 0)
    assert_whole(served)
    served.cancel(runs)
    served.run()
    assert served.counters.finished["cancelled"] == 2


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_requests(folder):
    served = engine(folder, 30_000)  # three or four adapters of five
    rng = np.random.default_rng(0)

    def serve(count):
        for i in range(count):
            name = NAMES[rng.integers(len(NAMES))] if i % 20 == 0 else NAMES[i % 3]
            stream = served.submit(Request((1, 2), 1 + i % 3, name, temperature=0))
            if i % 50 == 0:
                served.cancel(stream)
            while served.queued() > 20:
                served.step()
        served.run()
        gc.collect()
        return sys.getallocatedblocks()

    serve(1000)
    first = serve(1000)
    assert serve(8000) - first < 800  # a tenth of a block for each request
    assert_whole(served)


# ---- the batch-invariant mode


def logits_of(served, plan):
    """(tokens, length of the text -> logits) of each (request, steps after it)."""
    found, real = {}, served.logits

    def watched(parts):
        z = real(parts)
        for (span, row), one in zip(parts, z, strict=True):
            found[id(row.stream), span.start + span.length] = one
        return z

    served.logits = watched
    streams = played(served, plan)
    assert_whole(served)
    return [(s.tokens, {at: z for (owner, at), z in found.items() if owner == id(s)}) for s in streams]


@given(
    plan=st.lists(st.tuples(requests(), st.integers(0, 3)), min_size=1, max_size=7), chunk=st.integers(1, 9)
)
@settings(max_examples=5)
def test_in_the_invariant_mode_company_and_chunks_change_no_bit(float32, plan, chunk):
    """In float32, with a temperature: the logits of every token, and so the text, are those of a lone run."""

    how = {"invariant": True}
    together = logits_of(engine(float32, dtype=np.float32, chunk=chunk, **how), plan)
    for (request, _), (tokens, own) in zip(plan, together, strict=True):
        ((lone_tokens, lone),) = logits_of(engine(float32, dtype=np.float32, chunk=99, **how), [(request, 0)])
        assert tokens == lone_tokens
        for at, z in lone.items():
            assert np.array_equal(own[at], z)


def test_at_a_real_width_the_mode_changes_what_company_would_change(tmp_path):
    """D = 128, grouped heads, biases: without it some rows differ, so the law above is not empty."""
    model = llama(
        Config(97, 128, 352, 2, 4, 2, max_position_embeddings=100, attention_bias=True, mlp_bias=True),
        np.random.default_rng(0),
    )
    rng = np.random.default_rng(5)
    for p in named_params(model).values():
        if p.data.ndim == 1:
            p.data += rng.standard_normal(p.data.shape, np.float32) / 8
    freeze(model)
    for k, r in enumerate((1, 3, 8, 8)):
        copy = replica(model)
        config = LoraConfig(r=r, alpha=16, init="both")
        inject(copy, config, rng=np.random.default_rng(k))
        save_adapter(copy, tmp_path / f"a{k}")
    plan = [
        (Request(rng.integers(0, 97, int(n)), 3, f"a{k}" if k < 4 else None, seed=k), 0)
        for k, n in enumerate(rng.integers(1, 40, 7))
    ]

    def differs(invariant):
        how = {"invariant": invariant}
        together = logits_of(Engine(model, Bank(model, tmp_path), slots=5, chunk=7, **how), plan)
        count = 0
        for pair, (_, own) in zip(plan, together, strict=True):
            ((_, lone),) = logits_of(
                Engine(model, Bank(model, tmp_path), slots=1, positions=70, **how), [pair]
            )
            count += sum(not np.array_equal(own[at], z) for at, z in lone.items())
        return count

    assert differs(False)
    assert not differs(True)

"""A batch in micro-batches, on however many threads, has its gradient; the threads change no bit."""

import contextlib
import ctypes
from threading import Event, get_ident

import numpy as np
import pytest
from helpers import assert_precision_scales, batch, seeds, tiny, tiny_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController

from minilora import backend
from minilora.backend import cores, on_cores, one_blas_thread
from minilora.errors import InputError
from minilora.fast import parallel
from minilora.fast.folded import places
from minilora.fast.parallel import micro_batches, on_threads
from minilora.lora import LowRank, inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Llama
from minilora.tree import named_params, replica, trained


@pytest.fixture(autouse=True)
def _small_micro_batches(monkeypatch):
    monkeypatch.setattr(parallel, "MICRO_BATCH", 100)  # two rows of 5 tokens of width 10


def taken(model):
    """The gradients, which are taken away."""
    grads = {path: p.grad for path, p in trained(model).items()}
    for p in trained(model).values():
        p.grad = None
    return grads


@settings(max_examples=10)
@given(seed=seeds, n=st.integers(1, 7), threads=st.integers(1, 3))
def test_micro_batches_give_the_gradient_of_the_batch(seed, n, threads):
    def both(dtype):
        model, rng = tiny_lora(seed, dtype)
        ids, labels = batch(
            rng, n=n, t=5, ignored=0.6
        )  # micro-batches of unequal weight, some perhaps of none
        with on_threads(model, threads) as gradient:
            loss = gradient([(ids, labels)])
        yield np.concatenate([[dtype(loss)], *(g.ravel() for g in taken(model).values())])
        loss, back = model.loss(ids, labels, train=True)
        back()
        yield np.concatenate([[dtype(loss)], *(g.ravel() for g in taken(model).values())])

    assert_precision_scales(both)


@settings(max_examples=10)
@given(seed=seeds, n=st.integers(1, 9), dtype=st.sampled_from([np.float32, np.float64]))
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_the_number_of_threads_changes_no_bit(seed, n, dtype, recompute):
    model, rng = tiny_lora(seed, dtype)
    batches = [batch(rng, n=n, t=5), batch(rng, n=3, t=4)]
    results = []
    for threads in (1, 2, 3):
        with on_threads(model, threads, recompute) as gradient:
            results.append((gradient(batches), [g.tobytes() for g in taken(model).values()]))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("n", [2, 3, 6])
def test_only_a_lone_micro_batch_stays_on_the_callers_thread(n, monkeypatch):
    """To wait for one other thread gains nothing."""
    with one_blas_thread() as held:
        if not held:
            pytest.skip("this BLAS cannot be held to one thread, so there is one")
    used, real = [], Llama.loss
    monkeypatch.setattr(Llama, "loss", lambda *a, **k: used.append(get_ident()) or real(*a, **k))
    model, rng = tiny_lora(0)
    with on_threads(model, 2) as gradient:
        gradient([batch(rng, n=n, t=5)])
    assert len(used) == -(-n // 2)
    assert [thread == get_ident() for thread in used] == [n == 2] * len(used)


def test_a_model_with_dropout_uses_one_thread(monkeypatch):
    """Its masks come from one generator: two threads would draw them in an order that chance decides."""
    results, made = [], []
    monkeypatch.setattr(parallel, "replica", lambda model: made.append(model) or replica(model))
    for threads in (1, 3):
        model, rng = tiny(0)
        inject(model, LoraConfig(r=2, dropout=0.5, init="both"), rng=rng)
        made.clear()
        with on_threads(model, threads) as gradient:
            assert len(made) == 1
            results.append((gradient([batch(np.random.default_rng(1), n=8, t=5)]), taken(model)))
    (a, first), (b, second) = results
    assert a == b
    assert all(first[k].tobytes() == second[k].tobytes() for k in first)


@pytest.mark.parametrize("threads", [1, 2])
def test_each_weight_is_folded_once_for_all_micro_batches(threads, monkeypatch):
    model, rng = tiny_lora(0)
    formed, real = [], LowRank.merged
    monkeypatch.setattr(LowRank, "merged", lambda *a: formed.append(id(a[0].A.data)) or real(*a))
    adapters = sorted({id(place.adapter.A.data) for place in places(model)})
    assert len(adapters) == 7 * 2
    with on_threads(model, threads) as gradient:
        for n in (7, 4):
            gradient([batch(rng, n=n, t=5), batch(rng, n=n, t=5)])
            assert sorted(formed) == adapters
            formed.clear()
        with pytest.raises(InputError):
            gradient([(np.full((4, 5), 99), np.zeros((4, 5), int))])


def test_a_replica_shares_every_array_and_no_gradient():
    model, rng = tiny_lora(0)
    other = replica(model)
    for (path, p), (path_, q) in zip(named_params(model).items(), named_params(other).items(), strict=True):
        assert path == path_
        assert p.data is q.data
        assert p is not q
        assert p.trainable is q.trainable
    _, back = other.loss(*batch(rng), train=True)
    back()
    assert not [path for path, p in named_params(model).items() if p.grad is not None]
    assert all(p.grad is not None for p in trained(other).values())


@given(rows=st.integers(1, 30), T=st.integers(1, 30), width=st.integers(1, 9), most=st.integers(1, 999))
def test_micro_batches_cover_the_batch_in_order_and_their_weights_sum_to_one(rows, T, width, most):
    ids = np.arange(rows * T).reshape(rows, T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "MICRO_BATCH", most)
        cut = list(micro_batches(ids, ids, width))
    assert np.array_equal(np.concatenate([i for i, _, _ in cut]), ids)
    assert all(np.array_equal(i, labels) for i, labels, _ in cut)
    assert all(i.size * width < most + T * width for i, _, _ in cut)  # within a row of the most
    assert abs(sum(w for *_, w in cut) - 1) <= len(cut) * np.finfo(float).eps


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    model, rng = tiny_lora(0)
    ids, labels = batch(rng, n=4, t=5)
    with on_threads(model, 2) as gradient:
        assert gradient([(ids, np.full_like(labels, -100))]) == 0
    assert all((g == 0).all() for g in taken(model).values())


def test_replicas_work_on_after_a_refused_batch():
    model, rng = tiny_lora(0)
    ids, labels = batch(rng, n=4, t=5)
    with on_threads(model, 2) as gradient:
        with pytest.raises(InputError, match=r"labels have shape \(4, 4\); expected the ids' \(4, 5\)"):
            gradient([(ids, labels[:, :-1])])
        for _ in range(5):  # an error gives its replica back
            with pytest.raises(InputError, match="token id 99"):
                gradient([(np.where(ids >= 0, 99, ids), labels)])
        assert gradient([(ids, labels)]) > 0


@pytest.fixture
def openblas():
    """The functions of NumPy's own OpenBLAS: how many threads it has, and to set that."""
    try:
        library = ctypes.CDLL(np._core._multiarray_umath.__file__)
        count, hold = library.scipy_openblas_get_num_threads64_, library.scipy_openblas_set_num_threads64_
    except AttributeError:
        pytest.skip("this NumPy has another BLAS")
    before = count()
    yield count, hold
    hold(before)


def test_blas_is_limited_to_one_thread_and_released(openblas):
    count, hold = openblas
    hold(2)
    with one_blas_thread() as held:
        assert held
        assert count() == 1
    assert count() == min(2, cores())
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert count() == min(2, cores())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_map_on_cores_keeps_the_order_and_holds_blas(threads, openblas, monkeypatch):
    count, hold = openblas
    hold(2)
    monkeypatch.setattr(backend, "cores", lambda: threads)
    held, seen = [], set()

    def doubled(i):
        held.append(count())
        seen.add(get_ident())
        return 2 * i

    assert list(on_cores(doubled, range(50))) == [2 * i for i in range(50)]
    assert {*held} == {1}
    assert (get_ident() in seen) == (threads == 1)
    assert count() == min(2, cores())


@pytest.mark.parametrize("why", ["a GPU", "a BLAS that cannot be held"])
def test_a_map_on_cores_is_a_plain_one_where_threads_do_not_help(why, monkeypatch):
    monkeypatch.setattr(backend, "cores", lambda: 3)
    if why == "a GPU":
        monkeypatch.setattr(backend, "on_host", lambda: False)
    else:
        monkeypatch.setattr(backend, "one_blas_thread", lambda: contextlib.nullcontext(False))
    assert {*on_cores(lambda i: get_ident(), range(9))} == {get_ident()}


def test_an_error_in_a_map_on_cores_ends_it(monkeypatch):
    monkeypatch.setattr(backend, "cores", lambda: 2)
    begun, gate = [], Event()

    def one(i):
        begun.append(i)
        if i == 0:
            raise KeyError(i)
        gate.wait(0.01)

    with pytest.raises(KeyError):
        list(on_cores(one, range(1000)))
    assert len(begun) < 500


class Blas:
    """A BLAS library as threadpoolctl shows it; it has at least so many threads."""

    user_api, prefix = "blas", "libfake"

    def __init__(self, threads, least=1):
        self.num_threads, self.least, self.filepath = threads, least, str(id(self))

    def set_num_threads(self, n):
        self.num_threads = max(n, self.least)

    def info(self, debugging_info=False):
        return {"user_api": "blas", "num_threads": self.num_threads, "filepath": self.filepath}


@pytest.mark.parametrize(
    ("threads", "least", "held"), [((4, 2), 1, True), ((1,), 1, True), ((4, 2), 2, False)]
)
def test_every_blas_is_limited_and_one_that_cannot_be_is_reported(threads, least, held, monkeypatch):
    libraries = [Blas(n, least if i == 0 else 1) for i, n in enumerate(threads)]
    monkeypatch.setattr(backend, "blas_libraries", lambda: ThreadpoolController._from_controllers(libraries))
    with one_blas_thread() as said:
        assert said is held
        assert all(library.num_threads == library.least for library in libraries)
    assert [library.num_threads for library in libraries] == list(threads)


@pytest.mark.parametrize(
    ("variable", "held"), [("OPENBLAS", True), ("MKL", True), ("OMP", True), ("ELSE", False)]
)
def test_an_unknown_blas_is_judged_by_the_environment(variable, held, monkeypatch):
    monkeypatch.setattr(backend, "blas_libraries", lambda: ThreadpoolController._from_controllers([]))
    for name in ("OPENBLAS", "MKL", "OMP"):
        monkeypatch.delenv(f"{name}_NUM_THREADS", raising=False)
    monkeypatch.setenv(f"{variable}_NUM_THREADS", "1")
    with one_blas_thread() as said:
        assert said is held

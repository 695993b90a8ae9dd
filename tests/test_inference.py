"""What merging promises about speed, counted: a merged model makes the base's calls, an unmerged one more."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import EVERYTHING, LINEARS, TIED, N, T, batch, tiny

from minilora.decoding import generate
from minilora.lora import Adapted, inject, merge, owners
from minilora.methods.lora_config import LoraConfig
from minilora.tree import named_params


class Counted(np.ndarray):
    """An array whose every library call, also of what comes of it, is written down with its shapes."""

    calls = []  # noqa: RUF012

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **how):
        self.note(f"{ufunc.__name__}.{method}", inputs, out)
        if out is not None:
            how["out"] = tuple(plain(a) for a in out)
        result = getattr(ufunc, method)(*map(plain, inputs), **how)
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function, types, args, kwargs):
        self.note(function.__name__, args, None)
        return super().__array_function__(function, types, args, kwargs)

    def __getitem__(self, key):
        self.note("getitem", (self, *(key if isinstance(key, tuple) else (key,))), None)
        return super().__getitem__(key)

    @classmethod
    def note(cls, name, operands, out):
        shapes = tuple((a.shape, a.dtype.str) for a in operands if isinstance(a, np.ndarray))
        cls.calls.append((name, shapes, out is not None))


def plain(a):
    return a.view(np.ndarray) if isinstance(a, Counted) else a


@contextmanager
def counted(model):
    """The calls made inside, in order."""
    params = named_params(model).values()
    arrays = [p.data for p in params]
    for p in params:
        p.data = p.data.view(Counted)
    Counted.calls = calls = []
    yield calls
    for p, a in zip(params, arrays, strict=True):
        p.data = a


def forward(model, ids):
    model(ids)


def decode(model, ids):
    list(generate(model, ids, 4, rng=np.random.default_rng(0), temperature=0))


KINDS = {
    "lora": LoraConfig(r=3, alpha=7, targets=TIED, init="both"),
    "head": LoraConfig(r=3, alpha=7, targets=EVERYTHING, init="both"),
    "dora": LoraConfig(r=3, alpha=7, targets=LINEARS, init="both", dora=True),
    "saved": LoraConfig(r=3, alpha=7, modules_to_save=["norm", "embed_tokens"]),
}


def calls_of(job, kind=None, merged=False, tie=True):
    """The calls of a job (list), and how many layers are adapted by a pair of factors."""
    model, rng = tiny(1, np.float32, tie_word_embeddings=tie, attention_bias=True)
    ids, _ = batch(rng)
    adapted = 0
    if kind:
        inject(model, KINDS[kind], rng=rng)
        adapted = sum(isinstance(layer, Adapted) for _, layer in owners(model))
    if merged:
        merge(model)
    with counted(model) as calls:
        job(model, ids)
    return calls, adapted


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("job", [forward, decode])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_makes_exactly_the_calls_of_the_base(kind, job, tie):
    base, _ = calls_of(job, tie=tie)
    merged, _ = calls_of(job, kind, merged=True, tie=tie)
    assert merged == base  # the same functions in the same order, on the same shapes and dtypes
    assert Counter(name for name, *_ in base)["matmul.__call__"] > 7 * 2


@pytest.mark.parametrize("job", [forward, decode])
def test_an_unmerged_model_makes_two_more_products_per_map(job):
    base, _ = calls_of(job)
    unmerged, adapted = calls_of(job, "lora")

    def products(calls):
        return sum(name == "matmul.__call__" for name, *_ in calls)

    # q, k, v, o, gate, up, down of both blocks, and the tied embedding: its lookup one product, its head two
    assert adapted == 7 * 2 + 1
    passes = 1 if job is forward else 4
    assert products(unmerged) == products(base) + passes * (2 * 14 + 1 + 2)


def test_the_counter_sees_an_extra_call():
    model, rng = tiny()
    ids = rng.integers(0, 5, (N, T))
    with counted(model) as once:
        model(ids)
    with counted(model) as more:
        model.model.norm.weight.data + 0
        model(ids)
    assert len(more) == len(once) + 1

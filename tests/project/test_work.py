"""The work of a forward pass is what the shapes say, and counting it leaves the model as it was."""

import math

import numpy as np
import pytest
from helpers import SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from minilora.course.work import Work, work
from minilora.errors import InputError
from minilora.tree import named_params


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 2), st.integers(1, 3))
def test_the_work_is_what_the_shapes_say(N, T, layers, r):
    """Of every map, of attention's two products, of the head; unmerged an adapter's A and B; merged none."""
    rng = np.random.default_rng(0)
    model = ml.llama(config := ml.Config(**SIZES | {"num_hidden_layers": layers}), rng)
    ids = rng.integers(0, config.vocab_size, (N, T))
    was, params = ml.digest(model), named_params(model)
    maps = [p.shape for path, p in params.items() if "proj" in path]
    pairs = layers * T * config.num_attention_heads  # of a query and a key, for each token
    head = config.vocab_size * config.hidden_size
    # a column of ones beside the values gives the softmax its sum
    base = Work(
        len(maps) + 2 * layers + 1,
        N * T * (sum(map(math.prod, maps)) + pairs * (2 * config.head_dim + 1) + head),
    )
    assert work(model, ids) == base
    assert ml.digest(model) == was
    assert {type(p.data) for p in params.values()} == {np.ndarray}
    ml.inject(model, ml.LoraConfig(r=r), rng=rng)
    more = N * T * r * sum(map(sum, maps))
    assert work(model, ids) == (base.products + 2 * len(maps), base.multiplications + more)
    ml.merge(model)
    assert work(model, ids) == base


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    model = ml.llama(ml.Config(**SIZES), np.random.default_rng(0))
    before = [p.data for p in named_params(model).values()]
    with pytest.raises(InputError):
        work(model, np.array([[SIZES["vocab_size"]]]))
    assert all(p.data is data for p, data in zip(named_params(model).values(), before, strict=True))
    assert {type(data) for data in before} == {np.ndarray}
